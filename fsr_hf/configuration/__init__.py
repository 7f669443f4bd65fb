"""Configurations: `FSRConfig` and one class per family."""
