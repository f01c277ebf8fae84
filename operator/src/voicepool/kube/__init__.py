"""The Kubernetes API as voicepool uses it: a small client, an informer. The only package of the operator that does that I/O."""
