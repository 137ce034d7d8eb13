"""Vitrine's services: every folder is a process, every file beside them is shared by all."""
