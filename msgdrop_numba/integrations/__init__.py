"""Adapters for frameworks where one line isn't enough; each framework is imported by its own file alone."""
