"""`vitrine analyze`: what pages led to, from the events and the served log of a state.

Runs beside a service, or after it, and knows its tables and tokens.
"""
