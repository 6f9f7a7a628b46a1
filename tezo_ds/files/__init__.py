"""Files: text and JSON, safetensors with digests."""
