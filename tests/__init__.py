"""A package, so that this one is found and not what others install under the same name."""
