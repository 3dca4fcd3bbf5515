// A CUDA driver (libcuda.so.1) for machines without a GPU, for Triton's launcher and compiled steps: modules load, kernels do
// nothing. See runtime.c.
#include <string.h>
#include <stdlib.h>
#include <stdio.h>
#include <cuda.h>
extern void fake_capture_kernel(void*) __attribute__((weak)); extern int fake_unsafe(const char*) __attribute__((weak));
CUresult cuInit(unsigned f){return 0;} CUresult cuDriverGetVersion(int*v){*v=13000;return 0;}
CUresult cuGetErrorString(CUresult e,const char**s){*s="fake";return 0;} CUresult cuGetErrorName(CUresult e,const char**s){*s="fake";return 0;}
CUresult cuDeviceGet(CUdevice*d,int o){*d=o;return 0;} CUresult cuDeviceGetCount(int*n){*n=1;return 0;}
CUresult cuDeviceGetAttribute(int*v,CUdevice_attribute a,CUdevice d){switch(a){case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:*v=232448;break;case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:*v=132;break;case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:*v=9;break;case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:*v=0;break;case CU_DEVICE_ATTRIBUTE_WARP_SIZE:*v=32;break;case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:*v=65536;break;case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:*v=233472;break;default:*v=1;}return 0;}
CUresult cuCtxGetCurrent(CUcontext*c){*c=(CUcontext)1;return 0;} CUresult cuCtxSetCurrent(CUcontext c){return 0;} CUresult cuDevicePrimaryCtxRetain(CUcontext*c,CUdevice d){*c=(CUcontext)1;return 0;}
CUresult cuCtxGetDevice(CUdevice*d){*d=0;return 0;}
CUresult cuDevicePrimaryCtxGetState(CUdevice d,unsigned*f,int*a){*f=0;*a=1;return 0;}
CUresult cuModuleLoadData(CUmodule*m,const void*i){ if(fake_unsafe&&fake_unsafe("cuModuleLoadData"))return 900; *m=malloc(8);return 0;} CUresult cuModuleLoad(CUmodule*m,const char*i){ if(fake_unsafe&&fake_unsafe("cuModuleLoad"))return 900; FILE*f=fopen(i,"rb"); if(!f){fprintf(stderr,"[fake] cubin missing: %s\n",i);return 301;} fclose(f); *m=malloc(8);return 0;}
CUresult cuModuleGetFunction(CUfunction*f,CUmodule m,const char*n){*f=malloc(8);return 0;} CUresult cuModuleUnload(CUmodule m){return 0;}
CUresult cuFuncGetAttribute(int*v,CUfunction_attribute a,CUfunction f){*v=(a==CU_FUNC_ATTRIBUTE_NUM_REGS)?32:(a==CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK?1024:0);return 0;}
CUresult cuFuncSetAttribute(CUfunction f,CUfunction_attribute a,int v){return 0;} CUresult cuFuncSetCacheConfig(CUfunction f,CUfunc_cache c){return 0;}
CUresult cuPointerGetAttribute(void*d,CUpointer_attribute a,CUdeviceptr p){ if(a==CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr*)d=p; return 0;}
CUresult cuLaunchKernel(CUfunction f,unsigned a,unsigned b,unsigned c,unsigned d,unsigned e,unsigned g,unsigned s,CUstream st,void**p,void**x){ if(fake_capture_kernel)fake_capture_kernel(st);return 0;}
CUresult cuLaunchKernelEx(const CUlaunchConfig*c,CUfunction f,void**p,void**x){ if(fake_capture_kernel)fake_capture_kernel(c->hStream);return 0;}
CUresult cuOccupancyMaxActiveClusters(int*n,CUfunction f,const CUlaunchConfig*c){*n=1;return 0;}

CUresult cuGetProcAddress_v2(const char*s,void**p,int v,cuuint64_t f,CUdriverProcAddressQueryResult*r){*p=0;if(r)*r=1;return 500;}
int fake_tm(void){return 0;} __asm__(".globl cuTensorMapEncodeTiled\n.set cuTensorMapEncodeTiled, fake_tm\n.globl cuTensorMapEncodeIm2col\n.set cuTensorMapEncodeIm2col, fake_tm\n");
CUresult cuCtxSetLimit_stub_cuCtxSetLimit(){return 0;} __asm__(".globl cuCtxSetLimit\n.set cuCtxSetLimit, cuCtxSetLimit_stub_cuCtxSetLimit\n");
CUresult cuCtxGetLimit_stub_cuCtxGetLimit(){return 0;} __asm__(".globl cuCtxGetLimit\n.set cuCtxGetLimit, cuCtxGetLimit_stub_cuCtxGetLimit\n");
CUresult cuCtxSynchronize_stub_cuCtxSynchronize(){return 0;} __asm__(".globl cuCtxSynchronize\n.set cuCtxSynchronize, cuCtxSynchronize_stub_cuCtxSynchronize\n");
CUresult cuStreamSynchronize_stub_cuStreamSynchronize(){return 0;} __asm__(".globl cuStreamSynchronize\n.set cuStreamSynchronize, cuStreamSynchronize_stub_cuStreamSynchronize\n");
CUresult cuMemAlloc_stub_cuMemAlloc_v2(){return 0;} __asm__(".globl cuMemAlloc_v2\n.set cuMemAlloc_v2, cuMemAlloc_stub_cuMemAlloc_v2\n");
CUresult cuMemFree_stub_cuMemFree_v2(){return 0;} __asm__(".globl cuMemFree_v2\n.set cuMemFree_v2, cuMemFree_stub_cuMemFree_v2\n");
CUresult cuOccupancyMaxPotentialBlockSize_stub_cuOccupancyMaxPotentialBlockSize(){return 0;} __asm__(".globl cuOccupancyMaxPotentialBlockSize\n.set cuOccupancyMaxPotentialBlockSize, cuOccupancyMaxPotentialBlockSize_stub_cuOccupancyMaxPotentialBlockSize\n");
