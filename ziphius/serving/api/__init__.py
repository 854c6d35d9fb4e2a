"""The routes: a file each, shapes in, shapes out."""
