"""From text to token ids and back: tokenizer, chat template, sampler, streaming. The source of truth is the GGUF file.

Names for users are in their modules: `tokenizer.Tokenizer`, `template.ChatTemplate`, `sampler.Sampler`,
`streaming.TextStream` and `streaming.StopFilter`.
"""
