"""Checkpoints in Hugging Face's form: the only package that knows their key names.

name of a checkpoint --hub.py--> its folder
config.json <--config.py, families.py--> InternVLConfig
*.safetensors <--weights.py and saving.py, by the two-way tables of tables.py--> flat parameters
adapter_model.safetensors <--peft.py--> adapters
tokenizer files <--tokenizer.py, sentencepiece.py--> a transformers tokenizer
model.py describes an opened checkpoint as a Source; export.py writes a self-contained folder.
"""
