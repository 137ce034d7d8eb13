"""The ranking service: behaviour, the candidates it proposes, and their order."""
