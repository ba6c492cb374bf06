"""What the digest is made of, without workflows: find and read texts, rank sentences, draft. All of it blocks."""
