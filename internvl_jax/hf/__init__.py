"""Checkpoints in Hugging Face's form: the only room that knows their key names.

config.json --config.py--> InternVLConfig
*.safetensors <--weights.py, by the two-way tables of families.py--> flat parameters
tokenizer files --tokenizer.py--> a transformers tokenizer
"""
