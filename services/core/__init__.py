"""Basics for all parts: errors, deadlines, threads. Imports no other part of Vitrine, no gRPC, no torch."""
