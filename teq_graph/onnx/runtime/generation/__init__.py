"""How a sequence is continued: options, the loop of decoding, choosing tokens, tokens to text."""
