"""The HTTP API: the wire format of OpenAI's videos API, its guards, and the answers."""
