rule dataset:
    """Images and labels as memory-mappable arrays, with a manifest that vouches for them."""
    output:
        "data/{dataset}/train/images.npy",
        "data/{dataset}/train/labels.npy",
        "data/{dataset}/train/mean.npy",
        "data/{dataset}/val/images.npy",
        "data/{dataset}/val/labels.npy",
        manifest="data/{dataset}/dataset.json",
    log:
        "logs/data/{dataset}.log",
    benchmark:
        "benchmarks/data/{dataset}.tsv"
    threads: 4
    resources:
        mem_mb=memory(2000),
        runtime=lambda wildcards, attempt: attempt * 240,  # where a download is part of it
    params:
        config=settings_file("dataset"),
        folder=subpath(output.manifest, parent=True),
    shell:
        "nrcg dataset --config {params.config} --threads {threads} --out {params.folder} > {log} 2>&1"
