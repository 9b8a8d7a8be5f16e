"""Many completions of each prompt, sampled, scored and kept: `conch best-of-n`."""
