"""One question per script; all of them run their cases side by side through ``runner``."""
