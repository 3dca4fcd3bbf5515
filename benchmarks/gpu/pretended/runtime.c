// A CUDA runtime (libcudart) for machines without a GPU: it replaces the real one under torch by LD_PRELOAD.
//
// Memory is the host's, and kernels do nothing: results and times mean nothing. What is real is everything above it: torch's
// allocator and graphs, AOTInductor's code, its compilation and linking. Calls are counted, and a stream capture keeps CUDA's
// rules: what is illegal while a stream captures (in the modes global, thread_local and relaxed) prints CAPTURE VIOLATION and
// invalidates the capture. The rules were written from CUDA's documentation; where it disagrees with a GPU, the GPU is right.
//
// FAKE_DEVICES=2: so many GPUs. FAKE_LIMIT=bytes: allocations beyond fail. FAKE_TRACE=1: calls are printed.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <pthread.h>
#include <dlfcn.h>
#include <cuda_runtime_api.h>
static int trace(void){static int t=-1; if(t<0){char*e=getenv("FAKE_TRACE"); t=e?atoi(e):0;} return t;}
#define T(...) do{ if(trace()) {fprintf(stderr,"[fake] " __VA_ARGS__); fputc('\n',stderr);} }while(0)
static __thread cudaError_t last=cudaSuccess;
static __thread enum cudaStreamCaptureMode tmode=cudaStreamCaptureModeGlobal;
static __thread int curdev=0;
static int ndev(void){char*e=getenv("FAKE_DEVICES"); return e?atoi(e):1;}
struct Cap{int active, invalid; cudaStream_t s; enum cudaStreamCaptureMode mode; unsigned long long id; pthread_t th; int nodes;};
static struct Cap cap; static unsigned long long nextid=1; static pthread_mutex_t mu=PTHREAD_MUTEX_INITIALIZER;
long fake_launches, fake_memcpys, fake_syncs, fake_graph_launches, fake_captures, fake_mallocs, fake_bytes; 
static cudaError_t err(cudaError_t e){ last=e; return e; }
static int capturing(cudaStream_t s){ return cap.active && cap.s==s; }
// an unsafe call: prohibited for this thread while a capture is under way, by mode
static int unsafe_(const char*what){
  if(!cap.active) return 0;
  if(tmode==cudaStreamCaptureModeRelaxed) return 0;
  int mine=pthread_equal(cap.th,pthread_self());
  if(cap.mode==cudaStreamCaptureModeRelaxed) return 0;
  if(cap.mode==cudaStreamCaptureModeThreadLocal && !mine) return 0;
  fprintf(stderr,"[fake] CAPTURE VIOLATION: %s while stream %p is capturing (mode %d, %s thread)\n",what,(void*)cap.s,cap.mode,mine?"same":"another");
  cap.invalid=1; return 1;
}
struct Ev{int captured; unsigned long long id;};
cudaError_t cudaGetDeviceCount(int*c){*c=ndev();return cudaSuccess;}
cudaError_t cudaGetDevice(int*d){*d=curdev;return cudaSuccess;}
cudaError_t cudaSetDevice(int d){ if(d<0||d>=ndev()) return err(cudaErrorInvalidDevice); curdev=d;return cudaSuccess;}
cudaError_t cudaDriverGetVersion(int*v){*v=13000;return cudaSuccess;}
cudaError_t cudaRuntimeGetVersion(int*v){*v=13000;return cudaSuccess;}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp*p,int d){memset(p,0,sizeof*p);strcpy(p->name,"FAKE H100");p->totalGlobalMem=80ull<<30;p->major=9;p->minor=0;p->multiProcessorCount=132;
 p->warpSize=32;p->maxThreadsPerBlock=1024;p->maxThreadsPerMultiProcessor=2048;p->regsPerMultiprocessor=65536;p->regsPerBlock=65536;p->sharedMemPerBlock=49152;p->sharedMemPerBlockOptin=232448;p->sharedMemPerMultiprocessor=233472;
 p->maxGridSize[0]=2147483647;p->maxGridSize[1]=65535;p->maxGridSize[2]=65535;p->maxThreadsDim[0]=1024;p->maxThreadsDim[1]=1024;p->maxThreadsDim[2]=64;p->l2CacheSize=52428800;p->textureAlignment=512;p->memoryBusWidth=5120;p->maxBlocksPerMultiProcessor=32;return cudaSuccess;}
cudaError_t cudaDeviceGetAttribute(int*v,enum cudaDeviceAttr a,int d){switch(a){case cudaDevAttrComputeCapabilityMajor:*v=9;break;case cudaDevAttrComputeCapabilityMinor:*v=0;break;case cudaDevAttrMultiProcessorCount:*v=132;break;
 case cudaDevAttrMaxSharedMemoryPerBlock:*v=49152;break;case cudaDevAttrMaxSharedMemoryPerBlockOptin:*v=232448;break;case cudaDevAttrWarpSize:*v=32;break;case cudaDevAttrMaxGridDimX:*v=2147483647;break;case cudaDevAttrMaxGridDimY:*v=65535;break;case cudaDevAttrMaxThreadsPerBlock:*v=1024;break;default:*v=0;}return cudaSuccess;}
cudaError_t cudaDeviceGetStreamPriorityRange(int*a,int*b){*a=0;*b=-5;return cudaSuccess;}
cudaError_t cudaDeviceCanAccessPeer(int*c,int a,int b){*c=0;return cudaSuccess;}
cudaError_t cudaDeviceGetPCIBusId(char*s,int n,int d){snprintf(s,n,"0000:0%d:00.0",d);return cudaSuccess;}
// whatever the mode and the thread: the device encompasses the stream that captures
cudaError_t cudaDeviceSynchronize(void){fake_syncs++; if(cap.active){fprintf(stderr,"[fake] CAPTURE VIOLATION: cudaDeviceSynchronize\n");cap.invalid=1;return err(cudaErrorStreamCaptureUnsupported);}T("DeviceSynchronize");return cudaSuccess;}
static long limit(void){char*e=getenv("FAKE_LIMIT"); return e?atol(e):80l<<30;}
#include <malloc.h>
struct Al{char*p;size_t n;int dev;int host;}; static struct Al al[1<<16]; static int nal=0;
static void al_add(void*p,size_t n,int host){pthread_mutex_lock(&mu);for(int i=0;i<nal;i++)if(!al[i].p){al[i]=(struct Al){p,n,curdev,host};pthread_mutex_unlock(&mu);return;}al[nal++]=(struct Al){p,n,curdev,host};pthread_mutex_unlock(&mu);}
static void al_del(void*p){pthread_mutex_lock(&mu);for(int i=0;i<nal;i++)if(al[i].p==p)al[i].p=0;pthread_mutex_unlock(&mu);}
cudaError_t cudaMalloc(void**p,size_t n){ if(unsafe_("cudaMalloc"))return err(cudaErrorStreamCaptureUnsupported); if(fake_bytes+(long)n>limit()) return err(cudaErrorMemoryAllocation);
 *p=aligned_alloc(512,(n+511)/512*512); if(!*p)return err(cudaErrorMemoryAllocation); al_add(*p,n,0); fake_mallocs++; fake_bytes+=malloc_usable_size(*p); if(n<(256l<<20)) memset(*p,0,n); return cudaSuccess;}
cudaError_t cudaFree(void*p){ if(!p) return cudaSuccess; if(unsafe_("cudaFree"))return err(cudaErrorStreamCaptureUnsupported); al_del(p); fake_bytes-=malloc_usable_size(p); free(p);return cudaSuccess;}
cudaError_t cudaHostAlloc(void**p,size_t n,unsigned f){ if(unsafe_("cudaHostAlloc"))return err(cudaErrorStreamCaptureUnsupported); *p=aligned_alloc(512,(n+511)/512*512);memset(*p,0,n);al_add(*p,n,1);return cudaSuccess;}
cudaError_t cudaFreeHost(void*p){al_del(p);free(p);return cudaSuccess;}
cudaError_t cudaMemGetInfo(size_t*f,size_t*t){*t=80ull<<30;*f=*t-fake_bytes;return cudaSuccess;}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes*a,const void*p){memset(a,0,sizeof*a);a->type=cudaMemoryTypeUnregistered;for(int i=0;i<nal;i++)if(al[i].p&&(char*)p>=al[i].p&&(char*)p<al[i].p+al[i].n){a->type=al[i].host?cudaMemoryTypeHost:cudaMemoryTypeDevice;a->device=al[i].dev;a->devicePointer=(void*)p;break;}return cudaSuccess;}
cudaError_t cudaMemcpyAsync(void*d,const void*s,size_t n,enum cudaMemcpyKind k,cudaStream_t st){fake_memcpys++; if(capturing(st))cap.nodes++; T("MemcpyAsync %zu bytes kind %d",n,k); memcpy(d,s,n);return cudaSuccess;}
cudaError_t cudaMemcpy(void*d,const void*s,size_t n,enum cudaMemcpyKind k){ if(unsafe_("cudaMemcpy"))return err(cudaErrorStreamCaptureUnsupported); fake_memcpys++;fake_syncs++;memcpy(d,s,n);return cudaSuccess;}
cudaError_t cudaMemsetAsync(void*d,int v,size_t n,cudaStream_t st){fake_launches++; if(capturing(st))cap.nodes++; memset(d,v,n);return cudaSuccess;}
cudaError_t cudaMemset(void*d,int v,size_t n){memset(d,v,n);return cudaSuccess;}
static unsigned long nstream=0;
cudaError_t cudaStreamCreateWithPriority(cudaStream_t*s,unsigned f,int p){*s=(cudaStream_t)calloc(1,64);nstream++;return cudaSuccess;}
cudaError_t cudaStreamCreate(cudaStream_t*s){return cudaStreamCreateWithPriority(s,0,0);}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*s,unsigned f){return cudaStreamCreateWithPriority(s,f,0);}
cudaError_t cudaStreamDestroy(cudaStream_t s){return cudaSuccess;}
cudaError_t cudaStreamGetPriority(cudaStream_t s,int*p){*p=0;return cudaSuccess;}
cudaError_t cudaStreamQuery(cudaStream_t s){ if(unsafe_("cudaStreamQuery"))return err(cudaErrorStreamCaptureUnsupported);return cudaSuccess;}
cudaError_t cudaStreamSynchronize(cudaStream_t s){fake_syncs++;T("StreamSynchronize"); if(capturing(s)){cap.invalid=1;fprintf(stderr,"[fake] CAPTURE VIOLATION: cudaStreamSynchronize\n");return err(cudaErrorStreamCaptureUnsupported);}return cudaSuccess;}
cudaError_t cudaStreamWaitEvent(cudaStream_t s,cudaEvent_t e,unsigned f){return cudaSuccess;}
cudaError_t cudaStreamIsCapturing(cudaStream_t s,enum cudaStreamCaptureStatus*st){*st=capturing(s)?(cap.invalid?cudaStreamCaptureStatusInvalidated:cudaStreamCaptureStatusActive):cudaStreamCaptureStatusNone;return cudaSuccess;}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s,enum cudaStreamCaptureStatus*st,unsigned long long*id,cudaGraph_t*g,const cudaGraphNode_t**d,const cudaGraphEdgeData**e,size_t*n){cudaStreamIsCapturing(s,st);if(id)*id=capturing(s)?cap.id:0;if(g)*g=(cudaGraph_t)1;if(n)*n=0;return cudaSuccess;}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode*m){enum cudaStreamCaptureMode o=tmode;tmode=*m;*m=o;return cudaSuccess;}
cudaError_t cudaStreamBeginCapture(cudaStream_t s,enum cudaStreamCaptureMode m){pthread_mutex_lock(&mu); if(cap.active){fprintf(stderr,"[fake] second capture while one is under way\n");}
 memset(&cap,0,sizeof cap);cap.active=1;cap.s=s;cap.mode=m;cap.id=nextid++;cap.th=pthread_self();fake_captures++;pthread_mutex_unlock(&mu);T("BeginCapture");return cudaSuccess;}
cudaError_t cudaStreamEndCapture(cudaStream_t s,cudaGraph_t*g){ if(!capturing(s))return err(cudaErrorIllegalState); int bad=cap.invalid,n=cap.nodes;memset(&cap,0,sizeof cap);T("EndCapture %d nodes",n); if(bad){*g=0;return err(cudaErrorStreamCaptureInvalidated);} int*k=malloc(sizeof(int)*4);k[0]=n;*g=(cudaGraph_t)k;return cudaSuccess;}
cudaError_t cudaGraphGetNodes(cudaGraph_t g,cudaGraphNode_t*n,size_t*c){*c=((int*)g)[0];return cudaSuccess;}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t*e,cudaGraph_t g,unsigned long long f){*e=(cudaGraphExec_t)malloc(64);return cudaSuccess;}
cudaError_t cudaGraphDestroy(cudaGraph_t g){return cudaSuccess;}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g){ if(unsafe_("cudaGraphExecDestroy"))return err(cudaErrorStreamCaptureUnsupported);return cudaSuccess;}
cudaError_t cudaGraphLaunch(cudaGraphExec_t g,cudaStream_t s){fake_graph_launches++; if(capturing(s))return err(cudaErrorStreamCaptureUnsupported);return cudaSuccess;}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t*e,unsigned f){*e=(cudaEvent_t)calloc(1,sizeof(struct Ev));return cudaSuccess;}
cudaError_t cudaEventCreate(cudaEvent_t*e){return cudaEventCreateWithFlags(e,0);}
cudaError_t cudaEventDestroy(cudaEvent_t e){return cudaSuccess;}
cudaError_t cudaEventRecord(cudaEvent_t e,cudaStream_t s){struct Ev*v=(void*)e;v->captured=capturing(s);v->id=cap.id;return cudaSuccess;}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e,cudaStream_t s,unsigned f){return cudaEventRecord(e,s);}
cudaError_t cudaEventQuery(cudaEvent_t e){ if(unsafe_("cudaEventQuery"))return err(cudaErrorStreamCaptureUnsupported); if(((struct Ev*)e)->captured){fprintf(stderr,"[fake] cudaEventQuery on an event last recorded inside a capture\n");return err(cudaErrorCapturedEvent);} return cudaSuccess;}
cudaError_t cudaEventSynchronize(cudaEvent_t e){fake_syncs++;T("EventSynchronize");  if(((struct Ev*)e)->captured)return err(cudaErrorCapturedEvent);return cudaSuccess;}
cudaError_t cudaEventElapsedTime(float*t,cudaEvent_t a,cudaEvent_t b){*t=0.01f;return cudaSuccess;}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes*a,const void*f){memset(a,0,sizeof*a);a->binaryVersion=90;a->ptxVersion=90;a->maxThreadsPerBlock=1024;a->numRegs=32;return cudaSuccess;}
cudaError_t cudaFuncSetAttribute(const void*f,enum cudaFuncAttribute a,int v){return cudaSuccess;}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int*n,const void*f,int b,size_t d,unsigned fl){*n=2;return cudaSuccess;}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int*n,const void*f,int b,size_t d){*n=2;return cudaSuccess;}
cudaError_t cudaGetSymbolAddress(void**p,const void*s){static char buf[1<<20];*p=buf;return cudaSuccess;}
cudaError_t cudaMemcpyToSymbol(const void*s,const void*p,size_t n,size_t o,enum cudaMemcpyKind k){return cudaSuccess;}
struct Cfg{dim3 g,b;size_t sh;void*st;}; static __thread struct Cfg cfg[16]; static __thread int ncfg;
unsigned __cudaPushCallConfiguration(dim3 g,dim3 b,size_t sh,void*st){cfg[ncfg++]=(struct Cfg){g,b,sh,st};return 0;}
cudaError_t __cudaPopCallConfiguration(dim3*g,dim3*b,size_t*sh,void*st){struct Cfg c=cfg[--ncfg];*g=c.g;*b=c.b;*sh=c.sh;*(void**)st=c.st;return cudaSuccess;}
static void launched(cudaStream_t s){fake_launches++; if(capturing(s))cap.nodes++; T("launch");}
cudaError_t cudaLaunchKernel(const void*f,dim3 g,dim3 b,void**a,size_t sh,cudaStream_t s){launched(s);return cudaSuccess;}
cudaError_t __cudaLaunchKernel(cudaKernel_t f,dim3 g,dim3 b,void**a,size_t sh,cudaStream_t s){launched(s);return cudaSuccess;}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*c,const void*f,void**a){launched(c->stream);return cudaSuccess;}
cudaError_t __cudaGetKernel(cudaKernel_t*k,const void*f){*k=(cudaKernel_t)f;return cudaSuccess;}
void** __cudaRegisterFatBinary(void*f){static void*h;return &h;}
void __cudaRegisterFatBinaryEnd(void**h){} void __cudaUnregisterFatBinary(void**h){}
void __cudaRegisterFunction(void**h,const char*a,char*b,const char*c,int d,uint3*e,uint3*f,dim3*g,dim3*i,int*j){}
void __cudaRegisterVar(void**h,char*a,char*b,const char*c,int d,size_t e,int f,int g){}
cudaError_t cudaGetLastError(void){cudaError_t e=last;last=cudaSuccess;return e;}
cudaError_t cudaPeekAtLastError(void){return last;}
cudaError_t cudaGetDriverEntryPointByVersion(const char*s,void**f,unsigned v,unsigned long long fl,enum cudaDriverEntryPointQueryResult*r){void*p=dlsym(RTLD_DEFAULT,s);*f=p;if(r)*r=p?cudaDriverEntryPointSuccess:cudaDriverEntryPointSymbolNotFound;return cudaSuccess;}
cudaError_t cudaProfilerStart(void){return cudaSuccess;} cudaError_t cudaProfilerStop(void){return cudaSuccess;}
void fake_capture_kernel(void*st){launched((cudaStream_t)st);}
int fake_is_capturing(void){return cap.active;}
int fake_unsafe(const char*w){return unsafe_(w);}
