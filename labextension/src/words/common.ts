/** Strings that several views share. */
export const commonWords = {
  gpu: { en: 'GPU', ja: 'GPU' },
  ram: { en: 'RAM', ja: 'RAM' },
  disk: { en: 'Disk', ja: 'ディスク' },
  npu: { en: 'NPU', ja: 'NPU' },
  copy: { en: 'Copy', ja: 'コピー' },
  copied: { en: 'Copied', ja: 'コピーしました' },
  copyFailed: { en: 'Could not copy: select it and press Ctrl-C', ja: 'コピーできません。選択して Ctrl-C を押してください' },
  useInterrupt: { en: 'use ■ Interrupt to stop', ja: '停止するには ■(中断)を押してください' },
  lostKernel: {
    en: 'Model unloaded: the kernel ended or was restarted. Run the cell again.',
    ja: 'モデルは解放されました。カーネルが終了または再起動しました。セルを再実行してください。',
  },
} as const
