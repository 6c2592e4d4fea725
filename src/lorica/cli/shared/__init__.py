"""Parts that commands share: the parser, a recipe's options, the next commands, results of adapters."""
