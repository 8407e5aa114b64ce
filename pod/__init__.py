"""The half that runs in the pod: chunks -> verified tree -> recipe. Standard library only, Python 3.8 and later.

It arrives in the environment as one program, made of the modules that the job needs (transport.pod_program), or lies as
pod.py in the job's folder. In order: find the rank; join and check the chunks; unpack; write the config; take its own
variables out of the environment; then run startup commands and recipe in one bash, and stay above it as a small init.

    failures.py     its own exit codes, each with one plain sentence; any other code is the recipe's
    rank.py         which pod this is, and where rank 0 listens
    payload.py      chunks -> the job's description, and a tree that holds what was sent
    places.py       code root, run root, config, and the texts that name them
    process.py      the recipe's environment and bash script, and the small init above it
    shared.py       for unpack = "shared": one tree on shared storage for all pods
    peers.py        how the pods of a job know each other
    ray_nodes.py    where the job's pods form a Ray cluster
    ray_cluster.py  for a Ray cluster that the platform makes or has
    entry.py        the order of the steps; __main__.py starts it
"""
