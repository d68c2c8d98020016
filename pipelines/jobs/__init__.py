"""Recipes and stages that are sent elsewhere, and the drivers there."""
