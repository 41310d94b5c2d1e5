from __future__ import annotations
from dataclasses import dataclass
import torch
from ..pipeline import ImageRequest
from ..images import reference_pixels
@dataclass(frozen=True)
class Sample:
    latent: torch.Tensor
    references: tuple
    conditional: tuple
    partial: tuple | None
    unconditional: tuple
    @property
    def shape(self): return (tuple(self.latent.shape), tuple(tuple(r.shape) for r in self.references))
class TextSample: pass
class SampleCache:
    def __init__(self, folder, pipeline, buckets): self.p, self.b = pipeline, buckets
    dataset_fingerprint="x"
    def samples(self, examples):
        from .examples import Example
        out=[]
        from ..images import ReferenceSizes
        for e in examples:
            im, refs = self.b.images(e)
            with torch.inference_mode():
                c=self.p.encode_prompt(ImageRequest(e.text, *im.size, images=refs))
            out.append((im,c))
        res=[]
        with torch.inference_mode():
            vae=self.p._vae()
            for im,c in out:
                w,h=im.size
                px=reference_pixels(im, ReferenceSizes(w*h,w*h,None))
                l=vae.encode(px)[0].float()
                f=lambda x: None if x is None else (x[0].clone(), x[1])
                res.append(Sample(l.clone(), tuple(r[0].float().clone() for r in c.references), f(c.conditional), f(c.partial), f(c.unconditional)))
        return res
    def texts(self,e): return ()
