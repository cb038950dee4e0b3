"""The built-in video model `video-tiny`, and the networks that judge moving digits."""
