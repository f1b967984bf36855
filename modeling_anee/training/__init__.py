"""Fitting an artifact to a base, by a recipe, in stages that can be resumed. Part of the workshop: never shipped."""
