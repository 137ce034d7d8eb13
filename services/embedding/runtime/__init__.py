"""Devices, dynamic batching and thread pools."""
