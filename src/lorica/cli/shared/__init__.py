"""What commands share: the parser, a recipe's options, what they propose next, what they make of adapters."""
