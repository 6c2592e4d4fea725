"""What few configurations concern: costly expressions, and fields of PEFT's that lorica lacks."""
