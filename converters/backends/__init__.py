"""Writers of versions, one file a Triton back end."""
