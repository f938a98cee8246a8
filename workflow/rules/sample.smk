rule sample:
    """One shard of the samples of a method at a scale (algorithm 1)."""
    input:
        ddpm_files,
        guide_files,
    output:
        images="results/{experiment}/samples/{method}/scale{scale}/shard{shard}.npy",
        record="results/{experiment}/samples/{method}/scale{scale}/shard{shard}.json",
    log:
        "logs/{experiment}/sample/{method}_scale{scale}_shard{shard}.log",
    benchmark:
        "logs/{experiment}/sample/{method}_scale{scale}_shard{shard}.tsv"
    group:
        "{experiment}_{method}_{scale}"  # on a cluster, several shards are one job (--group-components)
    conda:
        "../envs/nrcg.yaml"
    threads: 1
    resources:
        gpu=gpus,
        mem_mb=guided_memory("sampling"),
        runtime=sample_runtime,
    params:
        config=settings_file("sample", "method"),
        num_samples=shard_size,  # not on the command line: a change makes the shard anew
        ddpm=folder("models/{experiment}/ddpm"),
        classifier=guide_flag,
    shell:
        "nrcg sample --config {params.config} --method {wildcards.method} --scale {wildcards.scale}"
        " --shard {wildcards.shard} --ddpm {params.ddpm} {params.classifier} --threads {threads}"
        " --out {output.images} > {log} 2>&1"
