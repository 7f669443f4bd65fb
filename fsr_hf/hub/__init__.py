"""From the package to a folder of the Hub: its code, its config and its weights."""
