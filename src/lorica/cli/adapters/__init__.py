"""Commands on the files of adapters, a module each."""
