"""Wav2Vec2 for Keras: an encoder of speech and a task of labelling it."""
