"""What a decoder makes of codes: likelihood of held-out images, samples and what they are worth."""
