"""What users bring, checked: model, tokenizer and data against each other."""
