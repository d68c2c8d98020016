"""The recipe's sections, a module each."""
