"""Fuzz targets: what others control, and the code that first looks at it. See dev/fuzz."""
