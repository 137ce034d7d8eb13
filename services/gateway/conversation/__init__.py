"""The Converse RPC: messages change a dialogue state, and the state narrows the recommendations."""
