rule sample:
    """One shard of the samples of a method at a scale (algorithm 1)."""
    input:
        ancient("models/{experiment}/ddpm/unet/diffusion_pytorch_model.safetensors"),
        ddpm="models/{experiment}/ddpm/training.json",
        guide=guide,
    output:
        images="results/{experiment}/samples/{method}/scale{scale}/shard{shard}.npy",
        record="results/{experiment}/samples/{method}/scale{scale}/shard{shard}.json",
    log:
        "logs/{experiment}/sample/{method}_scale{scale}_shard{shard}.log",
    benchmark:
        "benchmarks/{experiment}/sample/{method}_scale{scale}_shard{shard}.tsv"
    group:
        "{experiment}_{method}_{scale}"  # on a cluster, several shards are one job (--group-components)
    threads: 1
    resources:
        gpu=asked(lambda job: job.gpus),
        mem_mb=growing(lambda job, wildcards: job.guided_mb("sampling")),
        runtime=growing(lambda job, wildcards: job.sample_minutes(wildcards.method)),
    params:
        config=settings_file("sample", "method"),
        num_samples=files(lambda one, wildcards: one.shard_size(int(wildcards.shard))),  # not on the command line: a change makes the shard anew
        ddpm=subpath(input.ddpm, parent=True),
        classifier=guide_flag,
    shell:
        "nrcg sample --config {params.config} --method {wildcards.method} --scale {wildcards.scale}"
        " --shard {wildcards.shard} --ddpm {params.ddpm} {params.classifier} --threads {threads}"
        " --out {output.images} > {log} 2>&1"
