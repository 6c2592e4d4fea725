"""Commands that train a model or use a trained one, a module each."""
