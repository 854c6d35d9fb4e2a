"""Clients that are not ours, each in an environment of its own, against ``ziphius serve``."""
