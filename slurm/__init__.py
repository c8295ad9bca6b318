"""Data files only; a package so that importlib.resources finds them in every kind of install."""
