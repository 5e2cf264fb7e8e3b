import torch, cupy as cp, numpy as np, sys
torch.manual_seed(0); dev='cuda'; bf=torch.bfloat16
print(torch.cuda.get_device_name(0), torch.__version__, torch.backends.cudnn.version(), cp.cuda.runtime.driverGetVersion(), flush=True)
M={n:cp.RawModule(path=f'.probe/{n}.fatbin') for n in ['rmsnorm','swiglu','cross_entropy','attention']}
def run(m,k,grid,block,args,sh=0):
    f=M[m].get_function(k)
    if sh>49152: f.max_dynamic_shared_size_bytes=sh
    with cp.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        f((grid,),(block,),tuple(np.uint64(a.data_ptr()) if torch.is_tensor(a) else a for a in args),shared_mem=sh)
L=np.int64; F=np.float32; I=np.int32
def rel(a,b): return ((a.double()-b.double()).norm()/b.double().norm()).item()
def rn(n,c,s=1.,m=0.): return (torch.randn(n,c,device=dev)*s+m).to(bf)
nan=lambda n,c: torch.full((n,c),float('nan'),device=dev,dtype=bf)
def v(k,c): return k+('_8' if c%8==0 else '_1')
def rmsb(dx,dw,dy,x,w,part):
    n,h=x.shape; b=part.shape[0]
    run('rmsnorm',v('rmsnorm_backward',h),b,256,(dx,part,dy,x,w,L(n),L(h),F(1e-5)),4*h)
    run('rmsnorm','rmsnorm_gain',-(-h//32),256,(dw,part,L(b),L(h)))
for n,h in [(1,8),(3,1),(5,33),(37,1000),(700,4096),(2050,264),(9,14336),(2,24576)]:
    x,w,dy,dx=rn(n,h,2,.3),rn(1,h,.2,1),rn(n,h),rn(n,h); dw=torch.randn(1,h,device=dev); y=nan(n,h)
    X,W,DY=x.double(),w.double(),dy.double(); r=(X.pow(2).mean(1,True)+1e-5).rsqrt()
    Y=X*r*W; DX=dx.double()+r*(DY*W-X*r*r*(DY*W*X).mean(1,True)); DW=dw.double()+(DY*X*r).sum(0,True)
    part=torch.full((max(1,min(n,528,(16<<20)//(4*h))),h),float('nan'),device=dev)
    run('rmsnorm',v('rmsnorm',h),n,256,(y,x,w,L(h),F(1e-5))); rmsb(dx,dw,dy,x,w,part)
    gu,da,act=rn(n,2*h,3),rn(n,h),nan(n,h); G,U,D=gu[:,:h].double(),gu[:,h:].double(),da.double(); s=G.sigmoid()
    run('swiglu',v('swiglu',h),n,256,(act,gu,L(h))); A=G*s*U; DG=torch.cat([D*U*(s+G*s*(1-s)),D*G*s],1)
    run('swiglu',v('swiglu_backward',h),n,256,(gu,da,L(h)))
    print('rms/swiglu',n,h,'y %.1e dx %.1e dw %.1e act %.1e dgu %.1e'%(rel(y,Y),rel(dx,DX),rel(dw,DW),rel(act,A),rel(gu,DG)),flush=True)
for t,V in [(1,8),(7,1),(5,33),(64,32001),(300,2048),(33,128256)]:
    lg=rn(t,V,4); lab=torch.tensor([-100 if i%5==4 else (i*7919)%V for i in range(t)],device=dev,dtype=torch.int32); g=1/64
    ok=lab>=0; X=lg.double(); lse=X.logsumexp(1); tg=X.gather(1,lab.clamp(min=0).long()[:,None])[:,0]
    loss=(lse-tg)[ok].sum().item(); first=(X==X.max(1,True)[0]).int().argmax(1); cor=((first==lab)&ok).sum().item()
    P=X.softmax(1); P.scatter_add_(1,lab.clamp(min=0).long()[:,None],-torch.ones(t,1,device=dev,dtype=torch.double)); P=P*g*ok[:,None]
    rows=torch.empty(t,2,device=dev); sums=torch.zeros(1,2,device=dev)
    run('cross_entropy',v('cross_entropy',V),t,1024,(rows,lg,lab,L(V),I(1),F(g))); run('cross_entropy','cross_entropy_sums',1,1024,(sums,rows,L(t)))
    print('ce',t,V,'loss %.1e correct %d=%d grad %.1e'%(abs(sums[0,0].item()-loss)/max(loss,1e-9),sums[0,1].item(),cor,rel(lg,P) if V>1 else lg.abs().max().item()),flush=True)
def med(f):
    f(); ts=[]
    for _ in range(11):
        a,b=torch.cuda.Event(True),torch.cuda.Event(True); a.record(); f(); b.record(); b.synchronize(); ts.append(a.elapsed_time(b)/1e3)
    return sorted(ts)[5]
a,b=rn(32768,32768),nan(32768,32768); c=med(lambda:b.copy_(a)); lim=2*a.nbytes/c; print('copy %.0f GB/s'%(lim/1e9),flush=True); del a,b
def sp(name,by,f): r=by/med(f); print('%s %.0f GB/s %.2f of copy'%(name,r/1e9,r/lim),flush=True)
n,h=65536,4096; x,y,dy,dx,w=rn(n,h),nan(n,h),rn(n,h),rn(n,h),rn(1,h); dw=torch.zeros(1,h,device=dev); part=torch.empty(528,h,device=dev)
sp('rmsnorm',2*x.nbytes,lambda:run('rmsnorm','rmsnorm_8',n,256,(y,x,w,L(h),F(1e-5)))); sp('rmsnorm_backward',4*x.nbytes,lambda:rmsb(dx,dw,dy,x,w,part))
n,h=16384,14336; gu,act=rn(n,2*h),rn(n,h); sp('swiglu',3*act.nbytes,lambda:run('swiglu','swiglu_8',n,256,(act,gu,L(h)))); sp('swiglu_backward',5*act.nbytes,lambda:run('swiglu','swiglu_backward_8',n,256,(gu,act,L(h))))
t,V=4096,128256; lg=rn(t,V); lab=torch.arange(t,device=dev,dtype=torch.int32); rows=torch.empty(t,2,device=dev)
for g in (0,1): sp('cross_entropy g=%d'%g,(1+g)*lg.nbytes,lambda:run('cross_entropy','cross_entropy_8',t,1024,(rows,lg,lab,L(V),I(g),F(1e-3))))
