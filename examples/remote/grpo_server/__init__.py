"""The name under which the first service of this kind was started; see `uvicorn_main`."""
