"""`vitrine analyze`: results of recommendations, from the events and the impression log of a state.

It can run while a service uses the state. It reads the tables and the attribution tokens directly.
"""
