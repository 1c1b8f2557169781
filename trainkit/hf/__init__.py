"""Hugging Face's folders, both ways: config.json and safetensors to the fields and the tensors' names of our decoder, and back.

Nothing that is read is executed: JSON and safetensors alone, and a GGUF file through transformers' own reader.
"""
