"""From text to token ids and back: tokenizer, chat template, sampler, streaming. Source of truth: the GGUF file's metadata."""
