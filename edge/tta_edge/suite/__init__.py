"""The stream suite: what adapting does to a model on many kinds of streams, friendly and hostile.

`order` says what arrives, `catalogue` names the streams of a suite, `images` renders them, `players` answer them,
`play` puts both together, `store` keeps the results, `summary` judges them, `run` drives it all.
"""
