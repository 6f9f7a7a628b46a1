"""The part of a model before the first module that trains, which all branches share."""
