"""From text to token ids: a user's text stays text, and control tokens come from the chat template only."""
