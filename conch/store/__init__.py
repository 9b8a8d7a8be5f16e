"""The files of a model store on disk: versions, manifests, golden samples, warm-up requests. No torch."""
