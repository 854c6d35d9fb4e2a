"""Every setting. One file a table of the recipe; presets lie beside it."""
